"""Tables and files: what is read, what is written, and whose it is."""
