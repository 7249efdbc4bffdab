"""What a GPU is to be checked for, with models made on the spot: parity, speed, memory, faults, training, llama.cpp."""
