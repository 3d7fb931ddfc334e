"""Cases measured in processes of their own: what kills or hangs one takes no other case with it."""
