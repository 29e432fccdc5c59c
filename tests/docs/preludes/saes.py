# What docs/saes.md takes for granted: rows of contributions, and an SAE of the demo.
import torch

from codec_dist.sae import build

rows, held_out_rows = torch.rand(64, 64), torch.rand(32, 64)
some_rows, batch = rows[:32], rows[:16]
build("topk", {"modes": 128, "k": 4}, channels=64).save("runs/demo/sae/blocks.5/contribution-positive/5f0c…-s0")
