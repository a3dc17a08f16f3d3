"""How `memsched.trace` reads jaxprs. Nothing else in memsched looks into one."""
