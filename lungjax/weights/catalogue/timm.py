"""timm's safetensors files on the Hugging Face hub; top-1 of its results table. The hub publishes no checksum."""

from lungjax.weights.catalogue.record import HALF, IMAGENET, Network, PretrainedWeights, Scaling, layout_of, spec

Row = tuple[str, str, int, float, float, float]
TORCH_BN: Network = (("epsilon", 1e-5),)
TORCH_CONV: Network = (*TORCH_BN, ("padding", "symmetric"))  # not ported from TensorFlow but trained in PyTorch


def _records(
    scaling: Scaling,
    rows: list[Row],
    interpolation: str = "bicubic",
    licence: str = "apache-2.0",
    network: Network = (),
    classes: int = 1000,
) -> list[PretrainedWeights]:
    return [
        PretrainedWeights(
            name=f"{model}.{hub.split('.')[1]}",
            model=model,
            layout=layout_of("timm", model),
            url=f"https://huggingface.co/timm/{hub}/resolve/main/model.safetensors",
            filename=f"{hub}.safetensors",
            checksum="",
            classes=classes,
            input=spec(size, scaling, interpolation),
            crop=crop,
            top1=top1 or None,
            licence=licence,
            megabytes=round(4 * millions),
            network=network,
        )
        for model, hub, size, crop, top1, millions in rows
    ]


# model, repository, size, crop, top-1 at that size, million parameters
EFFICIENTNET = _records(
    IMAGENET,
    [
        ("efficientnet_b0", "tf_efficientnet_b0.aa_in1k", 224, 0.875, 76.88, 5.29),
        ("efficientnet_b1", "tf_efficientnet_b1.aa_in1k", 240, 0.882, 78.84, 7.79),
        ("efficientnet_b2", "tf_efficientnet_b2.aa_in1k", 260, 0.890, 80.07, 9.11),
        ("efficientnet_b3", "tf_efficientnet_b3.aa_in1k", 300, 0.904, 81.65, 12.23),
        ("efficientnet_b4", "tf_efficientnet_b4.aa_in1k", 380, 0.922, 83.04, 19.34),
        ("efficientnet_b5", "tf_efficientnet_b5.aa_in1k", 456, 0.934, 83.70, 30.39),
        ("efficientnet_b6", "tf_efficientnet_b6.aa_in1k", 528, 0.942, 84.12, 43.04),
        ("efficientnet_b7", "tf_efficientnet_b7.aa_in1k", 600, 0.949, 84.42, 66.35),
        # Noisy Student: trained on 300 million unlabelled photographs as well.
        ("efficientnet_b0", "tf_efficientnet_b0.ns_jft_in1k", 224, 0.875, 78.68, 5.29),
        ("efficientnet_b1", "tf_efficientnet_b1.ns_jft_in1k", 240, 0.882, 81.39, 7.79),
        ("efficientnet_b2", "tf_efficientnet_b2.ns_jft_in1k", 260, 0.890, 82.41, 9.11),
        ("efficientnet_b3", "tf_efficientnet_b3.ns_jft_in1k", 300, 0.904, 84.05, 12.23),
        ("efficientnet_b4", "tf_efficientnet_b4.ns_jft_in1k", 380, 0.922, 85.16, 19.34),
        ("efficientnet_b5", "tf_efficientnet_b5.ns_jft_in1k", 456, 0.934, 86.10, 30.39),
        ("efficientnet_b6", "tf_efficientnet_b6.ns_jft_in1k", 528, 0.942, 86.48, 43.04),
        ("efficientnet_b7", "tf_efficientnet_b7.ns_jft_in1k", 600, 0.949, 86.85, 66.35),
    ],
) + _records(
    IMAGENET,
    [
        ("efficientnet_b0", "efficientnet_b0.ra_in1k", 224, 0.875, 77.70, 5.29),
        ("efficientnet_b1", "efficientnet_b1.ft_in1k", 224, 0.875, 77.59, 7.79),
        ("efficientnet_b2", "efficientnet_b2.ra_in1k", 256, 0.875, 79.32, 9.11),
        ("efficientnet_b3", "efficientnet_b3.ra2_in1k", 288, 0.875, 81.47, 12.23),
        ("efficientnet_b4", "efficientnet_b4.ra2_in1k", 320, 0.875, 82.66, 19.34),
    ],
    network=TORCH_CONV,
)
LITE = _records(
    HALF,
    [
        ("efficientnet_lite0", "tf_efficientnet_lite0.in1k", 224, 0.875, 0.0, 4.65),
        ("efficientnet_lite1", "tf_efficientnet_lite1.in1k", 240, 0.882, 0.0, 5.42),
        ("efficientnet_lite2", "tf_efficientnet_lite2.in1k", 260, 0.890, 0.0, 6.09),
    ],
) + _records(
    HALF,
    [
        ("efficientnet_lite3", "tf_efficientnet_lite3.in1k", 300, 0.904, 0.0, 8.20),
        ("efficientnet_lite4", "tf_efficientnet_lite4.in1k", 380, 0.920, 0.0, 13.01),
    ],
    "bilinear",
)
EFFICIENTNETV2 = _records(
    IMAGENET,
    [
        ("efficientnetv2_b0", "tf_efficientnetv2_b0.in1k", 224, 0.875, 78.39, 7.14),
        ("efficientnetv2_b1", "tf_efficientnetv2_b1.in1k", 240, 0.882, 79.52, 8.14),
        ("efficientnetv2_b2", "tf_efficientnetv2_b2.in1k", 260, 0.890, 80.23, 10.10),
        ("efficientnetv2_b3", "tf_efficientnetv2_b3.in1k", 300, 0.904, 81.96, 14.36),
    ],
) + _records(
    HALF,  # for Google's pixel / 128 - 1: 0.4 % off at white
    [
        ("efficientnetv2_b3", "tf_efficientnetv2_b3.in21k_ft_in1k", 300, 0.9, 82.63, 14.36),
        ("efficientnetv2_s", "tf_efficientnetv2_s.in1k", 384, 1.0, 83.90, 21.46),
        ("efficientnetv2_m", "tf_efficientnetv2_m.in1k", 480, 1.0, 85.21, 54.14),
        ("efficientnetv2_l", "tf_efficientnetv2_l.in1k", 480, 1.0, 85.66, 118.52),
        ("efficientnetv2_s", "tf_efficientnetv2_s.in21k_ft_in1k", 384, 1.0, 84.33, 21.46),
        ("efficientnetv2_m", "tf_efficientnetv2_m.in21k_ft_in1k", 480, 1.0, 86.01, 54.14),
        ("efficientnetv2_l", "tf_efficientnetv2_l.in21k_ft_in1k", 480, 1.0, 86.80, 118.52),
        ("efficientnetv2_xl", "tf_efficientnetv2_xl.in21k_ft_in1k", 512, 1.0, 86.75, 208.12),
    ],
)
RESNET = _records(
    IMAGENET,
    [
        ("resnet18", "resnet18.tv_in1k", 224, 0.875, 69.76, 11.69),
        ("resnet34", "resnet34.tv_in1k", 224, 0.875, 73.31, 21.80),
        ("resnet50_v15", "resnet50.tv_in1k", 224, 0.875, 76.16, 25.56),
        ("resnet101_v15", "resnet101.tv_in1k", 224, 0.875, 77.40, 44.55),
        ("resnet152_v15", "resnet152.tv_in1k", 224, 0.875, 78.33, 60.19),
        ("resnet50_v15", "resnet50.tv2_in1k", 224, 0.965, 80.85, 25.56),
        ("resnet101_v15", "resnet101.tv2_in1k", 224, 0.965, 81.91, 44.55),
        ("resnet152_v15", "resnet152.tv2_in1k", 224, 0.965, 82.29, 60.19),
    ],
    "bilinear",
    "bsd-3-clause",
) + _records(
    IMAGENET,
    [
        ("resnet18", "resnet18.a1_in1k", 224, 0.95, 0.0, 11.69),
        ("resnet34", "resnet34.a1_in1k", 224, 0.95, 0.0, 21.80),
        ("resnet50_v15", "resnet50.a1_in1k", 224, 0.95, 80.38, 25.56),
        ("resnet101_v15", "resnet101.a1_in1k", 224, 0.95, 81.49, 44.55),
        ("resnet152_v15", "resnet152.a1_in1k", 224, 0.95, 82.00, 60.19),
        ("resnet50_v15", "resnet50.a1h_in1k", 224, 1.0, 80.65, 25.56),
        ("resnet101_v15", "resnet101.a1h_in1k", 224, 0.95, 81.95, 44.55),
        ("resnet152_v15", "resnet152.a1h_in1k", 224, 0.95, 82.82, 60.19),
    ],
)
BIT = (
    _records(
        HALF,
        [
            ("bit_r50x1", "resnetv2_50x1_bit.goog_in21k_ft_in1k", 448, 1.0, 80.39, 25.55),
            ("bit_r101x1", "resnetv2_101x1_bit.goog_in21k_ft_in1k", 448, 1.0, 82.33, 44.54),
            ("bit_r50x3", "resnetv2_50x3_bit.goog_in21k_ft_in1k", 448, 1.0, 83.98, 217.32),
            ("bit_r101x3", "resnetv2_101x3_bit.goog_in21k_ft_in1k", 448, 1.0, 84.43, 387.93),
            ("bit_r152x2", "resnetv2_152x2_bit.goog_in21k_ft_in1k", 448, 1.0, 84.47, 236.34),
            ("bit_r152x4", "resnetv2_152x4_bit.goog_in21k_ft_in1k", 480, 1.0, 84.94, 936.53),
        ],
        "bilinear",
    )
    + _records(
        HALF,
        [
            ("bit_r50x1", "resnetv2_50x1_bit.goog_in21k", 224, 0.875, 0.0, 68.26),
            ("bit_r101x1", "resnetv2_101x1_bit.goog_in21k", 224, 0.875, 0.0, 87.25),
            ("bit_r50x3", "resnetv2_50x3_bit.goog_in21k", 224, 0.875, 0.0, 345.40),
            ("bit_r101x3", "resnetv2_101x3_bit.goog_in21k", 224, 0.875, 0.0, 516.02),
            ("bit_r152x2", "resnetv2_152x2_bit.goog_in21k", 224, 0.875, 0.0, 321.73),
            ("bit_r152x4", "resnetv2_152x4_bit.goog_in21k", 224, 0.875, 0.0, 1107.30),
        ],
        "bilinear",
        classes=21843,
    )
    + _records(HALF, [("bit_r50x1", "resnetv2_50x1_bit.goog_distilled_in1k", 224, 0.875, 82.82, 25.55)])
)
CONVNEXT = _records(
    IMAGENET,
    [
        ("convnext_tiny", "convnext_tiny.fb_in1k", 224, 0.875, 82.07, 28.59),
        ("convnext_small", "convnext_small.fb_in1k", 224, 0.875, 83.14, 50.22),
        ("convnext_base", "convnext_base.fb_in1k", 224, 0.875, 83.84, 88.59),
        ("convnext_large", "convnext_large.fb_in1k", 224, 0.875, 84.30, 197.77),
        # From ImageNet-22k or 12k. At 288 pixels tiny's fb_in22k_ft_in1k drops to 78.95, all others gain.
        ("convnext_tiny", "convnext_tiny.fb_in22k_ft_in1k", 224, 0.875, 82.90, 28.59),
        ("convnext_small", "convnext_small.fb_in22k_ft_in1k", 224, 0.875, 84.58, 50.22),
        ("convnext_base", "convnext_base.fb_in22k_ft_in1k", 224, 0.875, 85.81, 88.59),
        ("convnext_large", "convnext_large.fb_in22k_ft_in1k", 224, 0.875, 86.61, 197.77),
        ("convnext_xlarge", "convnext_xlarge.fb_in22k_ft_in1k", 224, 0.875, 86.97, 350.20),
        ("convnext_tiny", "convnext_tiny.in12k_ft_in1k", 224, 0.95, 84.19, 28.59),
        ("convnext_small", "convnext_small.in12k_ft_in1k", 224, 0.95, 85.16, 50.22),
    ],
)
CONVNEXTV2 = _records(
    IMAGENET,
    [
        ("convnextv2_atto", "convnextv2_atto.fcmae_ft_in1k", 224, 0.875, 76.64, 3.71),
        ("convnextv2_femto", "convnextv2_femto.fcmae_ft_in1k", 224, 0.875, 78.48, 5.23),
        ("convnextv2_pico", "convnextv2_pico.fcmae_ft_in1k", 224, 0.875, 80.30, 9.07),
        ("convnextv2_nano", "convnextv2_nano.fcmae_ft_in1k", 224, 0.875, 81.86, 15.62),
        ("convnextv2_tiny", "convnextv2_tiny.fcmae_ft_in1k", 224, 0.875, 82.95, 28.64),
        ("convnextv2_base", "convnextv2_base.fcmae_ft_in1k", 224, 0.875, 84.89, 88.72),
        ("convnextv2_large", "convnextv2_large.fcmae_ft_in1k", 224, 0.875, 85.76, 197.96),
        ("convnextv2_huge", "convnextv2_huge.fcmae_ft_in1k", 224, 0.875, 86.26, 660.29),
        ("convnextv2_nano", "convnextv2_nano.fcmae_ft_in22k_in1k", 224, 0.875, 82.04, 15.62),
        ("convnextv2_tiny", "convnextv2_tiny.fcmae_ft_in22k_in1k", 224, 0.875, 83.90, 28.64),
        ("convnextv2_base", "convnextv2_base.fcmae_ft_in22k_in1k", 224, 0.875, 86.75, 88.72),
        ("convnextv2_large", "convnextv2_large.fcmae_ft_in22k_in1k", 224, 0.875, 87.27, 197.96),
    ],
    licence="cc-by-nc-4.0",
)
DENSENET = _records(
    IMAGENET,
    [
        ("densenet121", "densenet121.tv_in1k", 224, 0.875, 74.75, 7.98),
        ("densenet161", "densenet161.tv_in1k", 224, 0.875, 77.38, 28.68),
        ("densenet169", "densenet169.tv_in1k", 224, 0.875, 75.92, 14.15),
        ("densenet201", "densenet201.tv_in1k", 224, 0.875, 77.28, 20.01),
        ("densenet121", "densenet121.ra_in1k", 224, 0.875, 75.57, 7.98),
    ],
    network=TORCH_BN,
)
VGG = _records(
    IMAGENET,
    [
        ("vgg16", "vgg16.tv_in1k", 224, 0.875, 71.59, 138.36),
        ("vgg19", "vgg19.tv_in1k", 224, 0.875, 72.40, 143.67),
    ],
    "bilinear",
    "bsd-3-clause",
)
MOBILENET = (
    _records(
        HALF,
        [("mobilenet", "mobilenetv1_100.ra4_e3600_r224_in1k", 224, 0.875, 75.39, 4.23)],
        network=TORCH_CONV,
    )
    + _records(
        IMAGENET,
        [("mobilenetv2", "mobilenetv2_100.ra_in1k", 224, 0.875, 72.91, 3.50)],
        network=TORCH_CONV,
    )
    + _records(
        HALF,
        [
            ("mobilenetv3_small", "tf_mobilenetv3_small_100.in1k", 224, 0.875, 67.92, 2.54),
            ("mobilenetv3_large", "tf_mobilenetv3_large_100.in1k", 224, 0.875, 75.51, 5.48),
        ],
        "bilinear",
    )
    + _records(
        IMAGENET,
        [
            ("mobilenetv3_small", "mobilenetv3_small_100.lamb_in1k", 224, 0.875, 67.64, 2.54),
            ("mobilenetv3_large", "mobilenetv3_large_100.ra_in1k", 224, 0.875, 75.78, 5.48),
        ],
        network=TORCH_CONV,
    )
)
TIMM = EFFICIENTNET + LITE + EFFICIENTNETV2 + RESNET + BIT + CONVNEXT + CONVNEXTV2 + DENSENET + VGG + MOBILENET
