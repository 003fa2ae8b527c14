"""What the demo's summary must show; no wall-clock times."""

import json
import sys
from pathlib import Path

summary = json.loads(Path(sys.argv[1]).read_text())
wire = summary["wire"]
loss_down = 1 - summary["eval_loss_after"] / summary["eval_loss_before"]
traffic_down = 1 - wire["bytes_per_token_steady"] / wire["bytes_per_token_all_active"]
assert loss_down >= 0.20, f"held-out loss fell by {loss_down:.1%} only"
assert traffic_down >= 0.85, f"steady-state traffic fell by {traffic_down:.1%} only"
assert summary["peft"]["loss_difference"] <= 2e-3, summary["peft"]
assert summary["edge"]["torch_loaded"] is False
assert (Path(summary["adapter_dir"]) / "adapter_model.safetensors").exists()
print(f"demo: held-out loss {loss_down:.1%} lower, steady-state traffic {traffic_down:.1%} lower")
