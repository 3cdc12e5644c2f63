"""Makes torchvision importable with a CPU-only torch by declaring the operators that its import expects."""

import contextlib

import torch

if torch.version.cuda is None:
    LIBRARY = torch.library.Library("torchvision", "DEF")  # declarations last as long as the object
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pools = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    for name in (*pools, *(f"_{pool}_backward" for pool in pools), "qroi_align", "qnms"):
        with contextlib.suppress(RuntimeError):  # some versions of torchvision declare them
            LIBRARY.define(f"{name}(...) -> ...")
