// LD_PRELOAD fault shim: FAULT_PATH substring, FAULT_FN name, FAULT_AT n (1-based), FAULT_ERR errno, FAULT_MODE=err|short|flip|kill
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <unistd.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <sys/uio.h>
static atomic_long cnt; static const char*fn,*path,*mode; static long at=-1; static int err=5; static int every;
__attribute__((constructor)) static void init(void){fn=getenv("FAULT_FN");path=getenv("FAULT_PATH");mode=getenv("FAULT_MODE");if(!mode)mode="err";char*a=getenv("FAULT_AT");if(a){at=atol(a);every=a[strlen(a)-1]=='+';}char*e=getenv("FAULT_ERR");if(e)err=atoi(e);}
static int fdmatch(int fd){if(!path)return 1;char l[64],b[4096];snprintf(l,64,"/proc/self/fd/%d",fd);ssize_t n=readlink(l,b,4095);if(n<0)return 0;b[n]=0;return strstr(b,path)!=0;}
static int hit(const char*f){if(!fn||strcmp(f,fn))return 0;long c=atomic_fetch_add(&cnt,1)+1;int h=every?c>=at:c==at;if(h&&!strcmp(mode,"kill"))kill(getpid(),SIGKILL);return h;}
#define REAL(r,n,...) static r(*real)(__VA_ARGS__);if(!real)real=dlsym(RTLD_NEXT,n)
ssize_t write(int fd,const void*b,size_t n){REAL(ssize_t,"write",int,const void*,size_t);if(fdmatch(fd)&&hit("write")){if(!strcmp(mode,"short"))return real(fd,b,n>1?n/2:n);errno=err;return -1;}return real(fd,b,n);}
ssize_t pwrite64(int fd,const void*b,size_t n,off_t o){REAL(ssize_t,"pwrite64",int,const void*,size_t,off_t);if(fdmatch(fd)&&hit("pwrite")){if(!strcmp(mode,"short"))return real(fd,b,n>1?n/2:n,o);errno=err;return -1;}return real(fd,b,n,o);}
ssize_t pwrite(int fd,const void*b,size_t n,off_t o){return pwrite64(fd,b,n,o);}
ssize_t writev(int fd,const struct iovec*v,int n){REAL(ssize_t,"writev",int,const struct iovec*,int);if(fdmatch(fd)&&hit("writev")){errno=err;return -1;}return real(fd,v,n);}
static ssize_t rd(ssize_t r,void*b){return r;}
ssize_t read(int fd,void*b,size_t n){REAL(ssize_t,"read",int,void*,size_t);if(fdmatch(fd)&&hit("read")){if(!strcmp(mode,"short"))return real(fd,b,n>1?n/2:n);if(!strcmp(mode,"flip")){ssize_t r=real(fd,b,n);if(r>0)((char*)b)[r/2]^=1;return r;}errno=err;return -1;}return rd(real(fd,b,n),b);}
ssize_t pread64(int fd,void*b,size_t n,off_t o){REAL(ssize_t,"pread64",int,void*,size_t,off_t);if(fdmatch(fd)&&hit("pread")){if(!strcmp(mode,"short"))return real(fd,b,n>1?n/2:n,o);if(!strcmp(mode,"flip")){ssize_t r=real(fd,b,n,o);if(r>0)((char*)b)[r/2]^=1;return r;}errno=err;return -1;}return real(fd,b,n,o);}
ssize_t pread(int fd,void*b,size_t n,off_t o){return pread64(fd,b,n,o);}
int fsync(int fd){REAL(int,"fsync",int);if(fdmatch(fd)&&hit("fsync")){errno=err;return -1;}return real(fd);}
int fdatasync(int fd){REAL(int,"fdatasync",int);if(fdmatch(fd)&&hit("fdatasync")){errno=err;return -1;}return real(fd);}
int rename(const char*a,const char*b){REAL(int,"rename",const char*,const char*);if((!path||strstr(b,path))&&hit("rename")){errno=err;return -1;}return real(a,b);}
// preadv2, what Python's os.preadv calls, counts as pread; "short" halves the first buffer and drops the others
ssize_t preadv64v2(int fd,const struct iovec*v,int n,off_t o,int g){REAL(ssize_t,"preadv64v2",int,const struct iovec*,int,off_t,int);if(fdmatch(fd)&&hit("pread")){if(!strcmp(mode,"short")){struct iovec h=v[0];if(h.iov_len>1)h.iov_len/=2;return real(fd,&h,1,o,g);}if(!strcmp(mode,"flip")){ssize_t r=real(fd,v,n,o,g);if(r>0)((char*)v[0].iov_base)[0]^=1;return r;}errno=err;return -1;}return real(fd,v,n,o,g);}
ssize_t preadv2(int fd,const struct iovec*v,int n,off_t o,int g){return preadv64v2(fd,v,n,o,g);}
ssize_t preadv64(int fd,const struct iovec*v,int n,off_t o){return preadv64v2(fd,v,n,o,0);}
ssize_t preadv(int fd,const struct iovec*v,int n,off_t o){return preadv64v2(fd,v,n,o,0);}
