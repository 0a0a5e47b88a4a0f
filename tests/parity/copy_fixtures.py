"""Copy the fixtures that the parity tests need.

Usage: python tests/parity/copy_fixtures.py ../shared/fixtures
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WHOLE = (
    "dit_a_teacher.safetensors",
    "dit_a_student.safetensors",
    "ar.safetensors",
    "ar.npz",
    "ema.npz",
    "noise.npz",
    "mdlm_loss_a.npz",
    "mdlm_lightning.ckpt",
    "sdtt_lightning_plain.ckpt",
)
# prefixes of arrays; the uniforms of the reference's categorical draws are not needed where the
# drawn tokens are known
LEFT_OUT = {
    "distill_m2_dt8.npz": ("u_step",),
    "distill_m4_dt16.npz": ("u_step", "student_logp"),
    "divergences.npz": (
        "subs_mse_f64_grad",
        "subs_tvd_f64_grad",
        "subs_kl_fwd_f64_grad",
        "subs_kl_bwd_f64_grad",
    ),
    "transitions.npz": ("q_xs", "q_norm_0", "mdlm_", "closed_form"),
    "analytic.npz": ("probs_0", "probs_2", "probs_3"),
    "forward_a.npz": ("h_embed",),
    "sample_ancestral.npz": ("u2", "u3", "u4", "u5"),
}


def main(source: Path) -> None:
    for name in WHOLE:
        (HERE / name).write_bytes((source / name).read_bytes())
    for name, prefixes in LEFT_OUT.items():
        arrays = {k: v for k, v in np.load(source / name).items() if not k.startswith(prefixes)}
        if name == "transitions.npz":  # rows 1 to 3: t = 0.9, 0.5, 0.2
            arrays |= {k: v[1:4] for k, v in arrays.items() if k.startswith("q_norm")}
        if name == "forward_a.npz":
            arrays["log_p_subs"] = arrays["log_p_subs"][:1]
        np.savez_compressed(HERE / name, **arrays)
    networks = json.loads((source / "state_dict_keys.json").read_text())
    for facts in networks.values():  # blocks are all alike: the first stands for them
        first = {k: v for k, v in facts["state_dict"].items() if k.startswith("blocks.0.")}
        for i in range(facts["config"]["n_blocks"]):
            block = {k.replace("blocks.0.", f"blocks.{i}."): v for k, v in first.items()}
            assert block.items() <= facts["state_dict"].items()
            facts["state_dict"] = {
                k: v for k, v in facts["state_dict"].items() if k not in block or i == 0
            }
    (HERE / "state_dict_keys.json").write_text(json.dumps(networks) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
