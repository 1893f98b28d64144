"""Other libraries' interfaces on the ops of this one."""
