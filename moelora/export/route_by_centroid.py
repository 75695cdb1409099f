"""Print the LoRA of a request: python route.py "its prompt, as the server's chat template writes it"."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

FOLDER = Path(__file__).parent
ROUTER = json.loads((FOLDER / "router.json").read_text())


def last_turn(ids: list[int]) -> list[int]:
    """The places that count of a prompt's tokens: all but those of the turns before the user's last."""
    start = ROUTER["turn_start"]
    opens = [place for place in range(len(ids)) if start and ids[place : place + len(start)] == start]
    return [place for place in range(len(ids)) if not opens or not opens[0] <= place < opens[-1]]


@torch.no_grad()
def pick(model: AutoModel, input_ids: torch.Tensor) -> str | None:
    """The LoRA for a prompt's tokens [1, S]; None is the base model alone."""
    tensors = load_file(FOLDER / "router.safetensors")
    part = model.get_encoder() if model.config.is_encoder_decoder else model
    embed = part.get_input_embeddings() if ROUTER["embedding"] == "input" else lambda ids: part(ids).last_hidden_state
    prompt = embed(input_ids[:, last_turn(input_ids[0].tolist())])[0].float().mean(0)
    cosines = cosine_similarity(prompt - tensors["center"], tensors["centroids"] - tensors["center"])
    passed = cosines.max() >= tensors["threshold"][cosines.argmax()] if "threshold" in tensors else True
    return ROUTER["loras"][cosines.argmax()] if passed else ROUTER["otherwise"]


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(ROUTER["base_model"])
    print(pick(AutoModel.from_pretrained(ROUTER["base_model"]), tokenizer(sys.argv[1], return_tensors="pt").input_ids))
