"""The files of keras.applications: addresses and checksums are those of its source, top-1 of its documentation."""

from lungjax.weights.catalogue.record import CAFFE, HALF, IMAGENET, V2, PretrainedWeights, Scaling, layout_of, spec

BASE = "https://storage.googleapis.com/tensorflow/keras-applications"
OLD = "_weights_tf_dim_ordering_tf_kernels.h5"
Row = tuple[str, str, str, int, float, float, int]


def _records(
    folder: str, scaling: Scaling, licence: str, rows: list[Row], interpolation: str = "bilinear", layout: str = "keras"
) -> list[PretrainedWeights]:
    return [
        PretrainedWeights(
            name=f"{model}.keras",
            model=model,
            layout=layout_of(layout, model),
            url=f"{folder}/{file}",
            filename=file,
            checksum=checksum and f"{'md5' if len(checksum) == 32 else 'sha256'}:{checksum}",
            classes=1000,
            input=spec(size, scaling, interpolation),
            crop=crop,
            top1=top1,
            licence=licence,
            megabytes=megabytes,
        )
        for model, file, checksum, size, crop, top1, megabytes in rows
    ]


# model, file, checksum, size, crop, top-1, megabytes
EFFICIENTNET = _records(
    BASE.replace("/tensorflow", ""),  # the one family that lies elsewhere
    IMAGENET,
    "apache-2.0",
    [
        ("efficientnet_b0", "efficientnetb0.h5", "902e53a9f72be733fc0bcb005b3ebbac", 224, 0.875, 77.1, 29),
        ("efficientnet_b1", "efficientnetb1.h5", "1d254153d4ab51201f1646940f018540", 240, 0.882, 79.1, 31),
        ("efficientnet_b2", "efficientnetb2.h5", "b15cce36ff4dcbd00b6dd88e7857a6ad", 260, 0.890, 80.1, 36),
        ("efficientnet_b3", "efficientnetb3.h5", "ffd1fdc53d0ce67064dc6a9c7960ede0", 300, 0.904, 81.6, 48),
        ("efficientnet_b4", "efficientnetb4.h5", "18c95ad55216b8f92d7e70b3a046e2fc", 380, 0.922, 82.9, 75),
        ("efficientnet_b5", "efficientnetb5.h5", "ace28f2a6363774853a83a0b21b9421a", 456, 0.934, 83.6, 118),
        ("efficientnet_b6", "efficientnetb6.h5", "165f6e37dce68623721b423839de8be5", 528, 0.942, 84.0, 166),
        ("efficientnet_b7", "efficientnetb7.h5", "8c03f828fec3ef71311cd463b6759d99", 600, 0.949, 84.3, 256),
    ],
    "bicubic",
)
EFFICIENTNETV2_B = _records(
    f"{BASE}/efficientnet_v2",
    IMAGENET,
    "apache-2.0",
    [
        ("efficientnetv2_b0", "efficientnetv2-b0.h5", "21ecbf6da12460d5c40bb2f29ceb2188", 224, 0.875, 78.7, 29),
        ("efficientnetv2_b1", "efficientnetv2-b1.h5", "069f0534ff22adf035c89e2d9547a9dc", 240, 0.882, 79.8, 34),
        ("efficientnetv2_b2", "efficientnetv2-b2.h5", "424e49f28180edbde1e94797771950a7", 260, 0.890, 80.5, 42),
        ("efficientnetv2_b3", "efficientnetv2-b3.h5", "1f1fc43bd98a6e4fd8fdfd551e02c7a0", 300, 0.904, 82.0, 59),
    ],
    "bicubic",
)
EFFICIENTNETV2 = _records(
    f"{BASE}/efficientnet_v2",
    V2,
    "apache-2.0",
    [
        ("efficientnetv2_s", "efficientnetv2-s.h5", "e1d88a8495beba45748fedd0cecbe016", 384, 1.0, 83.9, 88),
        ("efficientnetv2_m", "efficientnetv2-m.h5", "a3bf6aa3276309f4fc6a34aa114c95cd", 480, 1.0, 85.3, 220),
        ("efficientnetv2_l", "efficientnetv2-l.h5", "27e6d408b53c7ebc868fefa357689935", 480, 1.0, 85.7, 479),
    ],
    "bicubic",
)
RESNET = _records(
    f"{BASE}/resnet",
    CAFFE,
    "mit",
    [
        ("resnet50", f"resnet50{OLD}", "2cb95161c43110f7111970584f804107", 224, 0.875, 74.9, 98),
        ("resnet101", f"resnet101{OLD}", "f1aeb4b969a6efcfb50fad2f0c20cfc5", 224, 0.875, 76.4, 171),
        ("resnet152", f"resnet152{OLD}", "100835be76be38e30d865e96f2aaae62", 224, 0.875, 76.6, 232),
    ],
)
RESNETV2 = _records(
    f"{BASE}/resnet",
    HALF,
    "not stated",
    [
        ("resnet50v2", f"resnet50v2{OLD}", "3ef43a0b657b3be2300d5770ece849e0", 224, 0.875, 76.0, 98),
        ("resnet101v2", f"resnet101v2{OLD}", "6343647c601c52e1368623803854d971", 224, 0.875, 77.2, 171),
        ("resnet152v2", f"resnet152v2{OLD}", "a49b44d1979771252814e80f8ec446f9", 224, 0.875, 78.0, 232),
    ],
    layout="keras_v2",
)
DENSENET = _records(
    f"{BASE}/densenet",
    IMAGENET,
    "bsd-3-clause",
    [
        ("densenet121", f"densenet121{OLD}", "9d60b8095a5708f2dcce2bca79d332c7", 224, 0.875, 75.0, 33),
        ("densenet169", f"densenet169{OLD}", "d699b8f76981ab1b30698df4c175e90b", 224, 0.875, 76.2, 57),
        ("densenet201", f"densenet201{OLD}", "1ceb130c1ea1b78c3bf6114dbdfd8807", 224, 0.875, 77.3, 80),
    ],
)
VGG = _records(
    f"{BASE}/vgg16",
    CAFFE,
    "cc-by-4.0",
    [("vgg16", f"vgg16{OLD}", "64373286793e3c8b2b4e3219cbf3544b", 224, 0.875, 71.3, 528)],
) + _records(
    f"{BASE}/vgg19",
    CAFFE,
    "cc-by-4.0",
    [("vgg19", f"vgg19{OLD}", "cbe5617147190e668d6c5d5026f83318", 224, 0.875, 71.3, 549)],
)
MOBILENET = [
    *_records(
        f"{BASE}/mobilenet", HALF, "apache-2.0", [("mobilenet", "mobilenet_1_0_224_tf.h5", "", 224, 0.875, 70.4, 17)]
    ),
    *_records(
        f"{BASE}/mobilenet_v2",
        HALF,
        "apache-2.0",
        [("mobilenetv2", f"mobilenet_v2{OLD.removesuffix('.h5')}_1.0_224.h5", "", 224, 0.875, 71.3, 14)],
    ),
    *_records(
        f"{BASE}/mobilenet_v3",
        HALF,
        "apache-2.0",
        [
            ("mobilenetv3_small", "weights_mobilenet_v3_small_224_1.0_float.h5",
             "8768d4c2e7dee89b9d02b2d03d65d862", 224, 0.875, 68.1, 10),
            ("mobilenetv3_large", "weights_mobilenet_v3_large_224_1.0_float.h5",
             "59e551e166be033d707958cf9e29a6a7", 224, 0.875, 75.6, 22),
        ],
    ),
]  # fmt: skip
# The same weights as timm's fb_in1k (tiny, small) and fb_in22k_ft_in1k (base, large, xlarge).
CONVNEXT = _records(
    f"{BASE}/convnext",
    IMAGENET,
    "mit",
    [
        ("convnext_tiny", "convnext_tiny.h5",
         "8ae6e78ce2933352b1ef4008e6dd2f17bc40771563877d156bc6426c7cf503ff", 224, 0.875, 81.3, 109),
        ("convnext_small", "convnext_small.h5",
         "ce1277d8f1ee5a0ef0e171469089c18f5233860ceaf9b168049cb9263fd7483c", 224, 0.875, 82.3, 192),
        ("convnext_base", "convnext_base.h5",
         "52cbb006d3dadd03f6e095a8ca1aca47aecdd75acb4bc74bce1f5c695d0086e6", 224, 0.875, 85.3, 339),
        ("convnext_large", "convnext_large.h5",
         "070c5ed9ed289581e477741d3b34beffa920db8cf590899d6d2c67fba2a198a6", 224, 0.875, 86.3, 755),
        ("convnext_xlarge", "convnext_xlarge.h5",
         "c1f5ccab661354fc3a79a10fa99af82f0fbf10ec65cb894a3ae0815f17a889ee", 224, 0.875, 86.7, 1310),
    ],
    "bicubic",
)  # fmt: skip
KERAS = EFFICIENTNET + EFFICIENTNETV2_B + EFFICIENTNETV2 + RESNET + RESNETV2 + DENSENET + VGG + MOBILENET
