"""What an indexed data set holds: pictures, clips, episodes or latents."""

from __future__ import annotations

from latentray.data.clips import FRAMES_MEMBER, VIDEO_MEMBER
from latentray.data.episodes import EPISODE_MEMBER
from latentray.data.shards import IndexedShards
from latentray.errors import LatentrayError
from latentray.records import LATENT_MEMBER, PICTURE_SUFFIXES

PICTURES, CLIPS, EPISODES, LATENTS = "pictures", "clips", "episodes", "latents"
MEMBERS: dict[str, tuple[str, ...]] = {
    PICTURES: PICTURE_SUFFIXES,
    CLIPS: (VIDEO_MEMBER, FRAMES_MEMBER),
    EPISODES: (EPISODE_MEMBER,),
    LATENTS: (LATENT_MEMBER,),
}
"""Kind -> the members that make a sample one of it, the preferred first."""
_LOOKED_AT = 16


def kind_of(opened: IndexedShards) -> str:
    """By the manifest and the index's columns; where they do not say it, by the first sample that can be read."""
    if opened.manifest.kind == LATENTS:
        return LATENTS
    columns = set(opened.columns)
    for kind, own in ((EPISODES, {"steps"}), (CLIPS, {"frames"}), (PICTURES, {"width", "height"})):
        if own <= columns:
            return kind
    for x in range(min(opened.count, _LOOKED_AT)):
        try:
            held = {name.lower() for name in opened.read(x)}
        except LatentrayError:  # damage is found, and counted, where the data are used
            continue
        for kind, members in MEMBERS.items():
            if held & set(members):
                return kind
    return PICTURES
