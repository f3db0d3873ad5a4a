"""The quickstart as a client of its endpoint: every caption, drawn over HTTP as any other client would."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from latentray.data import synthetic

_IN_FLIGHT = 12
_PER_REQUEST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture that the endpoint drew for a combination; `extra` beyond the ones of the 54-caption grid."""

    kind: synthetic.Kind
    pixels: np.ndarray
    extra: bool


def draw_captions(base_url: str, key: str, *, per_caption: int, per_unseen: int, seed: int) -> list[Drawn]:
    """`per_caption` pictures of all 54 combinations, and `per_unseen` of each combination left out of training."""
    asked = [(kind, per_caption, 1000 * seed + 17 * i, False) for i, kind in enumerate(synthetic.KINDS)]
    for i, kind in enumerate(synthetic.UNSEEN):
        for first in range(0, per_unseen, _PER_REQUEST):
            n = min(_PER_REQUEST, per_unseen - first)
            asked.append((kind, n, 1000 * seed + 500_000 + 1000 * i + first, True))

    def one(request: tuple[synthetic.Kind, int, int, bool]) -> list[Drawn]:
        kind, n, request_seed, extra = request
        body = {"prompt": synthetic.caption(kind), "n": n, "seed": request_seed}
        pictures = generate(base_url, key, body)
        return [Drawn(kind=kind, pixels=pixels, extra=extra) for pixels in pictures]

    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        return [drawn for batch in pool.map(one, asked) for drawn in batch]


def generate(base_url: str, key: str, body: dict[str, Any]) -> list[np.ndarray]:
    """`POST /v1/images/generations`, as any client of OpenAI's API does; the pictures, uint8 (H,W,3)."""
    request = urllib.request.Request(
        f"{base_url}/v1/images/generations",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback, whatever proxy is set
    with direct.open(request, timeout=300) as reply:
        data = json.load(reply)["data"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).convert("RGB")) for item in data]
