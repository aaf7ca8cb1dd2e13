"""Manifests, splits, and the bags read from slides."""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.bags.manifest import Manifest, ManifestError, SlideEntry, read_manifest

__all__ = ["Manifest", "ManifestError", "SlideEntry", "read_manifest"]

# Help pages read the policies alone.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.bags.manifest": (
            "Manifest",
            "ManifestError",
            "SlideEntry",
            "read_manifest",
        ),
    },
)
