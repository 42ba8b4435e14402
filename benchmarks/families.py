"""Model families: groupwise's fast path beside its fallback and beside TRL, whole steps in turn, in one run.

    python benchmarks/families.py                        all families at full size, two threads: hours
    python benchmarks/families.py --families "Gemma 2" Mixtral --pairs 2 --seconds 1200
    python benchmarks/families.py --scale 0.2            fewer prompts; below 0.125 shorter ones as well

Each model has random weights, the hidden size and about the active parameters of `reasoning` (workloads.py), and the structure
of its family: windows, soft caps, sinks, RoPE, experts (8, of which 2 are active) and every kind of layer of a hybrid. Windows
are 128 tokens, where a family's own is longer than these sequences. `fallback` is groupwise with padded batches through
transformers (backend "transformers"); TRL generates with transformers' `generate`. These two, which take most of the time, have
a turn to warm up with --warm only.

Each turn is a line in the .jsonl file beside the table, which is written anew after each family from all lines of the file, the
latest run of each family. A family whose fast side falls back is not measured, and the exit code is then 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import HERE, Peer, Report, line_of, median, per_token, ratio, turns
from rich.console import Console
from workloads import WORKS, Work, new_model, scaled

BASE = WORKS["reasoning"]
SLOW = ("fallback", "trl")
WINDOW = {"sliding_window": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
GPT_OSS_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def partial_rotary(share: float, theta: float = 10_000.0) -> dict[str, Any]:
    """RoPE on a share of each head's elements."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}}


def family(model_type: str, *, kv_heads: int = 1, mlp: int = 848, **architecture: Any) -> Work:
    """`reasoning` with a model of another family; a head of keys and values for the three of queries if nothing else is said."""
    return replace(BASE, model_type=model_type, kv_heads=kv_heads, mlp=mlp, architecture=architecture)


def layers(kinds: str) -> dict[str, Any]:
    """Kinds of layers by their initials."""
    names = {"s": "sliding_attention", "f": "full_attention", "l": "linear_attention", "c": "conv", "m": "mlp", "e": "moe"}
    return {"layer_types": [names[kind] for kind in kinds]}


FAMILIES: dict[str, Work] = {
    "Qwen3": BASE,
    "Llama": family("llama", rope_parameters=LLAMA3, max_position_embeddings=131_072),
    "Mistral": family("mistral", **WINDOW),
    "Gemma 2": family(
        "gemma2", query_pre_attn_scalar=64, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **WINDOW, **layers("sfsf")
    ),
    "Gemma 3": family("gemma3_text", query_pre_attn_scalar=64, **WINDOW, **layers("sssf")),
    "Phi-3": family("phi3", kv_heads=3, mlp=768, head_dim=None, **WINDOW, **partial_rotary(0.75)),
    "gpt-oss": family(
        "gpt_oss",
        mlp=424,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_parameters=GPT_OSS_YARN,
        max_position_embeddings=131_072,
        **WINDOW,
        **layers("sfsf"),
    ),
    "SmolLM3": family("smollm3", no_rope_layer_interval=4),
    "GLM-4": family("glm4", **partial_rotary(0.5)),
    "OLMo 2": family("olmo2", kv_heads=3, mlp=768, head_dim=None, tie_word_embeddings=False),
    "OLMo 3": family("olmo3", kv_heads=3, mlp=768, head_dim=None, tie_word_embeddings=False, **WINDOW, **layers("sssf")),
    "Granite": family(
        "granite",
        head_dim=None,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=1 / 64,
        logits_scaling=8.0,
    ),
    "Qwen3-MoE": family("qwen3_moe", moe_intermediate_size=424, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
    "Mixtral": family("mixtral", mlp=424, num_local_experts=8, num_experts_per_tok=2),
    "DeepSeek V3": family(
        "deepseek_v3",
        kv_heads=3,
        mlp=824,
        head_dim=None,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=272,
        n_group=4,
        topk_group=2,
        rope_parameters=DEEPSEEK_YARN,
        max_position_embeddings=163_840,
    ),
    "Qwen3-Next": family(
        "qwen3_next",
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        shared_expert_intermediate_size=192,
        **layers("lllf"),
        **partial_rotary(0.25),
    ),
    "Falcon-H1": family(
        "falcon_h1",
        mlp=552,
        mamba_d_ssm=256,
        mamba_n_heads=4,
        mamba_d_head=64,
        mamba_d_state=64,
        mamba_n_groups=1,
        mamba_chunk_size=128,
        mamba_rms_norm=False,
        embedding_multiplier=5.65,
        key_multiplier=0.39,
        attention_out_multiplier=0.94,
        ssm_out_multiplier=0.24,
    ),
    "Granite 4 hybrid": family(
        "granitemoehybrid",
        mlp=208,
        head_dim=None,
        num_local_experts=8,
        num_experts_per_tok=2,
        shared_intermediate_size=208,
        mamba_n_heads=6,
        mamba_d_head=64,
        mamba_d_state=64,
        mamba_n_groups=1,
        mamba_chunk_size=128,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=1 / 64,
        logits_scaling=6.0,
        position_embedding_type="nope",
        **layers("lllf"),
    ),
    "Nemotron-H": family(
        "nemotron_h",
        mlp=936,
        num_hidden_layers=None,
        layers_block_type=layers("lelmlefm")["layer_types"],
        mamba_num_heads=6,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=2,
        chunk_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=312,
        moe_shared_expert_intermediate_size=312,
    ),
    "LFM2": family("lfm2", mlp=792, head_dim=None, block_auto_adjust_ff_dim=False, **layers("ccfc")),
}


def active_parameters(work: Work) -> int:
    """Weights that a token is multiplied with: of active experts only; those of the output layer, not of the embedding."""
    module = new_model(work, "meta")
    config, head = module.config, module.get_output_embeddings().weight
    experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, key, 0))), 1)
    active = getattr(config, "num_experts_per_tok", 1) / experts
    total = head.numel()
    for name, weight in module.named_parameters():
        if weight.dim() > 1 and weight is not head and "embed" not in name:
            total += round(weight.numel() * (active if ".experts." in name else 1))
    return total


# --- measuring


def peers_of(trl: Path) -> dict[str, Peer]:
    found = {
        "fast": Peer(sys.executable, "worker_groupwise.py"),
        "fallback": Peer(sys.executable, "worker_groupwise.py", {"backend": "transformers"}),
    }
    return found | ({"trl": Peer(str(trl), "worker_trl.py")} if trl.exists() else {})


class Record:
    """The lines of the .jsonl file, and the table made of them."""

    def __init__(self, out: Path, scale: float) -> None:
        self.out, self.lines, self.scale = out, out.with_suffix(".jsonl"), scale
        self.run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def add(self, name: str, turn: int, side: str, report: Report) -> None:
        line = {"run": self.run, "scale": self.scale, "family": name, "turn": turn, "side": side, **report}
        with self.lines.open("a") as file:
            print(json.dumps(line), file=file)

    def read(self) -> dict[str, list[Report]]:
        """Of each family, the lines of its latest run at this scale."""
        found: dict[str, list[Report]] = {}
        for text in self.lines.read_text().splitlines() if self.lines.exists() else []:
            line = json.loads(text)
            if line["scale"] != self.scale:
                continue
            kept = [other for other in found.get(line["family"], []) if other["run"] == line["run"]]
            found[line["family"]] = [*kept, line]
        return found

    def write(self) -> None:
        """The table anew."""
        found = self.read()
        self.out.write_text("\n".join(text(self.scale, {name: found[name] for name in FAMILIES if name in found})) + "\n")


def measure(name: str, found: Iterator[tuple[int, str, Report]], record: Record, console: Console) -> bool:
    """Take a family's turns; False if its fast side fell back or failed."""
    for turn, side, report in found:
        record.add(name, turn, side, report)
        record.write()
        if "error" in report:
            console.print(f"  {side:<10} {report['error']}", markup=False, soft_wrap=True)
            if side == "fast":
                return False
            continue
        console.print(line_of(side, report))
        if side == "fast" and (reason := report["paths"]["fallback"]):
            console.print(f"  THE FAST SIDE FELL BACK: {reason}", markup=False, soft_wrap=True)
            return False
    return True


# --- the table


def text(scale: float, found: dict[str, list[Report]]) -> list[str]:
    size = scaled(BASE, scale)
    lines = [
        "# Model families",
        "",
        f"`reasoning`{'' if scale == 1 else f' at a scale of {scale:g}'}: {size.prompts} prompts of {size.prompt_tokens} tokens, "
        f"{size.group_size} completions each of at most {size.max_tokens} tokens; fp32, PyTorch {torch.__version__}."
        " `python benchmarks/families.py` measures again. Medians; ratios are of seconds per useful token, the other side over "
        "groupwise's fast path: above 1, the fast path is faster. `fallback` is groupwise with padded batches through "
        "transformers.",
        "",
        "| family | active weights, M | turns | s/step: fast | fallback | TRL | step: fallback / fast | TRL / fast "
        "| generation: fallback / fast | TRL / fast | training: fallback / fast | TRL / fast | peak MiB: fast | fallback | TRL |",
        "|" + "---|" * 15,
    ]
    lines += [row(name, reports) for name, reports in found.items()]
    gains = {name: {side: gain(reports, side) for side in SLOW} for name, reports in found.items()}
    for side, label in zip(SLOW, ("the fallback", "TRL"), strict=True):
        known = {name: of[side] for name, of in gains.items() if of[side] is not None}
        if known:
            worst = min(known, key=lambda name: known[name])
            middle = statistics.median(known.values())
            lines += [
                "",
                f"Step against {label}: median {middle:.2f}, least {known[worst]:.2f} ({worst}), {len(known)} families.",
            ]
    lines += ["", "What the fast side ran on, and which side failed:", ""]
    for name, reports in found.items():
        lines += [f"- {name}: {note}" for note in notes(reports)]
    return lines


def of_side(reports: Sequence[Report], side: str) -> list[Report]:
    """The turns that count: not the first of the fast side, which warms up."""
    return [report for report in reports if report["side"] == side and "seconds" in report and report["turn"] > 0]


def gain(reports: Sequence[Report], side: str) -> float | None:
    ours, theirs = of_side(reports, "fast"), of_side(reports, side)
    return ratio(theirs, ours, "seconds") if ours and theirs else None


def row(name: str, reports: list[Report]) -> str:
    ours = of_side(reports, "fast")
    sides = {side: of_side(reports, side) for side in ("fast", *SLOW)}
    failed = {report["side"] for report in reports if "error" in report}

    def cell(side: str, value: Any) -> str:
        return value(sides[side]) if sides[side] and ours else "failed" if side in failed else ""

    cells = [name, f"{active_parameters(FAMILIES[name]) / 1e6:.2f}", ", ".join(str(len(found)) for found in sides.values())]
    cells += [cell(side, lambda found: f"{median(found, 'seconds'):.2f}") for side in sides]
    for key in ("seconds", "generation", "training"):
        cells += [cell(side, lambda found, key=key: f"{ratio(found, ours, key):.2f}") for side in SLOW]
    cells += [cell(side, lambda found: f"{median(found, 'peak_mib'):,.0f}") for side in sides]
    return "| " + " | ".join(cells) + " |"


def notes(reports: Sequence[Report]) -> list[str]:
    paths = next((report["paths"] for report in reports if report["side"] == "fast" and "paths" in report), None)
    found = []
    if paths is not None and paths["fallback"]:
        found.append(f"**not measured, the fast side fell back**: {paths['fallback']}")
    elif paths is not None:
        details = "".join(f"; {name}: {why.splitlines()[0]}" for name, why in paths["details"].items())
        found.append(f"generation {paths['generation']}; training {paths['training']}{details}")
        fast = of_side(reports, "fast")
        if fast:
            found.append(
                f"generation at {1 / per_token(fast, 'generation'):,.0f} tok/s, training {median(fast, 'training'):.2f} s"
            )
    found += [f"**{report['side']} failed**: {report['error']}" for report in reports if "error" in report]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--pairs", type=int, default=3, help="Turns of each side.")
    parser.add_argument("--warm", action="store_true", help="A turn more of each slow side, which does not count.")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=12 * 3600.0, help="No turn is started that would end later than this.")
    parser.add_argument("--peers", type=Path, default=Path(".bench"), help="Where TRL's environment is.")
    parser.add_argument("--out", type=Path, default=HERE / "FAMILIES.md")
    arguments = parser.parse_args()
    console, record = Console(highlight=False), Record(arguments.out, arguments.scale)
    ends, failed = time.monotonic() + arguments.seconds, []
    for i, name in enumerate(arguments.families):
        now = time.monotonic()
        console.print(f"[bold]{name}[/bold]")
        # What is left of the time is shared out evenly among the families that are left.
        share = now + (ends - now) / (len(arguments.families) - i)
        work = replace(scaled(FAMILIES[name], arguments.scale), threads=arguments.threads)
        peers = peers_of(arguments.peers / "trl" / "bin" / "python")
        found = turns(work, peers, arguments.pairs, ends=share, cold=() if arguments.warm else SLOW)
        with closing(found):
            if not measure(name, found, record, console):
                failed.append(name)
    console.print(f"written: {arguments.out}")
    if failed:
        raise SystemExit(f"no fast path, or it failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
