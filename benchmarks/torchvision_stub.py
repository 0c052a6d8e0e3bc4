"""Operators that torchvision misses beside a torch for CPUs; MosaicML streaming imports it, and needs none of them."""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
ROI = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
for name in ("nms", "qnms", "qroi_align", *ROI, *(f"_{name}_backward" for name in ROI)):
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
