"""Mixed into the workers of vLLM on a CPU (--worker-extension-cls), in vLLM's own environment: imports nothing of groupwise."""

from typing import Any


class Packing:
    """A reload that packs the weights of experts again: that of vLLM 0.32 writes them, as they are in the files, over the packed
    ones that the kernel on a CPU reads."""

    model_runner: Any
    reload_weights: Any

    def reload_and_pack(self, weights_path: str) -> None:
        for module in self.model_runner.get_model().modules():
            method = getattr(module, "quant_method", None)
            if method is not None and hasattr(method, "moe_kernel"):
                method.moe_kernel = None  # weights are packed where there is no kernel yet
        self.reload_weights(weights_path=weights_path)
