"""Labelled images and small image networks that several methods share."""

from library.images.data import ImageBatch, ImageData, Images, image_splits, load_images
from library.images.networks import NETWORKS, PlainNet, ResNet, image_network

__all__ = [
    "NETWORKS",
    "ImageBatch",
    "ImageData",
    "Images",
    "PlainNet",
    "ResNet",
    "image_network",
    "image_splits",
    "load_images",
]
