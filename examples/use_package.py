"""Uses an emitted package: `python examples/use_package.py build` after `attncc compile … -o build`.

The package needs torch and triton, and no attncc.
"""

import sys

import torch


def main() -> None:
    sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else "build")
    from gemma2_local import attention, choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sq, sk = (4096, 4096) if device == "cuda" else (40, 72)
    q = torch.randn(1, 32, sq, 128, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(1, 16, sk, 128, dtype=torch.bfloat16, device=device) for _ in "kv")
    o, lse = attention(q, k, v, return_lse=True)
    config, rule = choose(device, Sq=sq, Sk=sk)
    print(f"o {tuple(o.shape)} {o.dtype}, lse {tuple(lse.shape)} on {device}")
    print(f"config {dict(config)}: {rule}")


if __name__ == "__main__":
    main()
