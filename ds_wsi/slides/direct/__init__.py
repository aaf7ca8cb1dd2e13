"""Slides of the TIFF family read without OpenSlide: their JPEG tiles by their offsets, decoded by libjpeg-turbo."""
