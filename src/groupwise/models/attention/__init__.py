"""Attention over packed sequences, and everything that surrounds it in a decoder's layers.

A Hugging Face decoder runs on one packed sequence of tokens, [1, N], with explicit positions; its attention layers call back
(`registry`), and an `Attend` computes which tokens attend to which:

    training.py          prompts and completions in one pass, in training and prefill
      training_padded.py   ... in PyTorch on a CPU
      training_varlen.py   ... through FlashAttention on a GPU, in bfloat16 and float16
      training_flex.py     ... through flex attention on a GPU, in float32
    decoding.py          the KV cache of generation and its steps
      decoding_step.py     ... a step through all layers in one C++ call
      decoding_torch.py    ... in PyTorch
      cuda_graphs.py       ... captured as graphs on a GPU
    layers.py            RMSNorm, SwiGLU and QK-norm with RoPE on C++ kernels
    latent.py            latent attention with a compressed KV cache in generation

This works for decoders whose attention goes through transformers' attention registry, with sliding windows, soft caps and sinks
(`attend.AttentionForm`), which a trial finds out. Others run padded batches through transformers' own attention.
"""
