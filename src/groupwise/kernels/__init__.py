"""C++ kernels for the CPU, each compiled when it is first needed (`compiled`).

`packed_attention`: attention in training, forward and backward. `decode_attention`: attention in one decode step.
`decode_step`: a decode step through all layers. `blocked`: matmul with weights in the blocked layout. `layers`: RMSNorm, RoPE
and SwiGLU, forward and backward. `sample`: sampling a token from logits.

Where there is no C++ compiler, PyTorch computes the same, slower.
"""
