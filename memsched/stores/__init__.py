"""Where bytes rest: files that are read, arenas in memory, and files for what is moved out."""
