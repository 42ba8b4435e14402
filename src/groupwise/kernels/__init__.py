"""Our own C++ for the CPU: attention in training (`packed`) and in generation (`decode`), a whole step of generation (`step`),
products with weights in panels (`panels`), what lies between matrix products (`layers`), and the choice of a token (`choose`).

It is compiled when it is first needed (`compiled`). Without a C++ compiler PyTorch does the same, slower.
"""
