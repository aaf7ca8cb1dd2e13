"""Manifests, splits, and the bags read from slides."""

from ds_wsi.bags.manifest import Manifest, ManifestError, SlideEntry, read_manifest

__all__ = ["Manifest", "ManifestError", "SlideEntry", "read_manifest"]
