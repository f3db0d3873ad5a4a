"""What the terminal shows once an endpoint answers: commands that work for the kind of model that is served."""

from __future__ import annotations

import json

from latentray.checkpoint import manifest
from serving.releases import Release

_CONFIG = "config.json"
_TO_FILE = '| python3 -c \'import json, sys; print(json.load(sys.stdin)["data"][0]["b64_json"])\' | base64 -d >'
_EXAMPLES = {
    "pictures": """
  curl -s {url}/v1/images/generations {header}-H "Content-Type: application/json" \\
    -d '{{"prompt": "a red circle on a white background", "seed": 1}}' \\
    {to_file} picture.png

  curl -s {url}/v1/images/edits {header}-F image=@picture.png -F "prompt=a blue square on a white background" \\
    {to_file} changed.png

  import base64, os, openai
  client = openai.OpenAI(base_url="{url}/v1", api_key={key})
  reply = client.images.generate(prompt="a red circle on a white background", extra_body={{"seed": 1}})
  open("picture.png", "wb").write(base64.b64decode(reply.data[0].b64_json))
""",
    "larger": """
  curl -s {url}/v1/images/edits {header}-F image=@small.png -F "prompt=a red circle on a white background" \\
    {to_file} large.png
""",
    "clips": """
  curl -s {url}/v1/videos/generations {header}-H "Content-Type: application/json" \\
    -d '{{"prompt": "a red circle moving right", "seed": 1}}' \\
    {to_file} clip.webp
""",
    "actions": """
  curl -s {url}/v1/models {header}              # the observations that it is told
  curl -s {url}/v1/actions {header}-H "Content-Type: application/json" -d '{{"observations": {{...}}, "seed": 1}}'
""",
}


def greeting(url: str, release: Release, *, with_key: bool) -> str:
    """What to type next, for an endpoint at `url`."""
    example = _EXAMPLES[_kind_of(release)].format(
        url=url,
        header='-H "Authorization: Bearer $API_KEY" ' if with_key else "",
        key='os.environ["API_KEY"]' if with_key else '"none"',
        to_file=_TO_FILE,
    )
    told = " (API_KEY holds a client's key)" if with_key else ""
    return f"\nServing {release.id} at {url}{told}\n{example}"


def _kind_of(release: Release) -> str:
    """One of `_EXAMPLES`."""
    found = manifest.find(release.uri)
    if found is None or _CONFIG not in found.files:
        return "pictures"
    config = json.loads(manifest.fetch_file(release.uri, _CONFIG, found).read_text())
    if "policy" in config:
        return "actions"
    if config.get("beside", {}).get("kind") == "super_resolution":
        return "larger"
    return "clips" if config.get("frames") else "pictures"
