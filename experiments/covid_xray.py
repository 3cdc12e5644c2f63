"""COVID-19 detection on chest X-rays: the study's CNN (422,177 parameters), frozen networks and two DeepCovid networks.

    python -m lungjax.main --experiment=covid_xray:model=xray_cnn
    python -m lungjax.main --experiment=covid_xray:model=efficientnet_lite0     # not in the study: all layers, ImageNet
    python -m lungjax.main --experiment=covid_xray:model=densenet201,protocol=study
    python -m lungjax.tables --table=covid_xray --workdir=runs/tables --run --seeds=5
    python -m lungjax.prepare --dataset=covid_xray_5k/oversampled --source=CLONE  # of the study's repository

Study: github.com/Mithunjack/covid-19-xay-image-classification. resnet18, squeezenet1_1 and the X-rays are from
github.com/shervinmin/DeepCovid (arXiv 2004.09363). The published accuracy is .9896 for the CNN (.97 in the text of the
README), .6938 for MobileNetV2, .9750 for ResNet101V2 and .9625 for DenseNet201. On 2 cores xray_cnn trains in minutes
and the heads of the other networks in tens of minutes (step times: tests/benchmarks/README.md). On 2,683 of the study's
2,688 X-rays, reduced to 288 pixels, five seeds reached a mean accuracy of .978 (.967 to .988), but found only 66 % of
the COVID-19 images (53 to 78 %); experiments/README.md has all scores, and those on X-rays from other hospitals.

| | study | clean |
| --- | --- | --- |
| splits | test is also val, generated images in train | val cut from train by patient, no copies, none generated |
| few COVID images | 121 generated images (covid_xray_5k/oversampled), or those of DeepCovid | class weights |
| xray_cnn | 100 times 3 batches, last weights, nearest-neighbor resizing | up to 30 epochs, best AUC on val, bilinear |
| xray_cnn:dropout=true | two dropout layers (.25), as in the study's README but not in its last run | the same |
| frozen networks | input 0..1 | input range of their weights |
| DeepCovid | best accuracy on val, which is test | best AUC on val |
| computation on GPU, TPU | float32 | bfloat16 |

Caveats: none of the published scores is reliable. The accuracy of .9896 means 95 of 96 random test images, of which
94 % are "non" (always predicting "non" gives .936). Of the 100 COVID test images, 37 are also in train, and all
generated images come from one X-ray. The scores of the frozen networks were copied from another project (138 images,
each in train and in test). COVID images are figures from the web, whereas the others come from one hospital; the report
therefore shows a baseline that uses the source alone.

Not reproducible: train images were 265 px high by mistake (here 256, as in test), validation used 160 random images of
the test split (here all, every 30 steps), and the images that the frozen networks used are unknown. DeepCovid trained
on a random crop (8 to 100 % of the area) and tested on the central square; here it trains on zooms and tests on
complete images. xray_cnn keeps the study's accidental stride of 3, and its single output is for "non". The study
imports VGG16 but never trains it; its settings here are those of the other frozen networks.
"""

from dataclasses import replace

from lungjax.config import PROTOCOLS, Config, DataConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, preset, slug

FROZEN = ("mobilenetv2", "resnet101v2", "densenet201", "vgg16")
DEEPCOVID = ("resnet18", "squeezenet1_1")
PRETRAINED = "efficientnet_lite0"  # not in the study: all layers trained from ImageNet weights


def get_config(model: str = "xray_cnn", protocol: str = "clean", dropout: bool = False) -> Config:
    """Arguments: model; protocol (clean or study); dropout (the two layers of xray_cnn in the study's README)."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    one_of("model", model, ("xray_cnn", *FROZEN, *DEEPCOVID, PRETRAINED))
    if study and model == PRETRAINED:
        raise ValueError(f"model={model}: the study did not train it; use protocol=clean")
    if dropout and model != "xray_cnn":
        raise ValueError(f"dropout=True: the two dropout layers are those of xray_cnn, not of {model}")
    size, ranged, augment = (256, 256), model == "xray_cnn" or study, preset("none")
    if model == "xray_cnn":
        head = HeadConfig(output="sigmoid", positive_class="non")
        network = ModelConfig(name=model, dropout=0.25 if dropout else None, head=head)
        optim, augment = OptimConfig(name="adam", lr=1e-3), preset("xray_covid_online")
        train = TrainConfig(batch_size=32, epochs=30, patience=10)
        if study:
            train = TrainConfig(batch_size=32, steps=300, eval_steps=30, keep="last")
    elif model == PRETRAINED:  # as in finetune, but larger and longer
        size, augment = (224, 224), preset("light")
        network = ModelConfig(name=model, weights="imagenet", momentum=0.9)
        optim = OptimConfig(name="adamw", lr=3e-4, schedule="cosine", weight_decay=1e-4)
        train = TrainConfig(batch_size=32, epochs=10)
    elif model in DEEPCOVID:
        size, ranged = (224, 224), False
        network = ModelConfig(name=model, weights="torchvision_v1")
        decays = tuple(epoch / 100 for epoch in range(7, 100, 7))
        optim = OptimConfig(name="sgd", lr=1e-4, momentum=0.9, schedule="step", decay_at=decays, tune="head")
        optim = replace(optim, frozen_batch_norm="update")  # frozen norms follow the batch in torch's training mode
        augment = replace(augment, zoom=(-0.7, 0.0), shift=(0.15, 0.15), fill="edge")
        train = TrainConfig(batch_size=20, epochs=100, monitor="slice.accuracy" if study else "slice.auc_macro")
    else:
        head = HeadConfig(pool="avg2x2_flatten", hidden=(64,), hidden_dropout=0.5)
        network = ModelConfig(name=model, weights="imagenet", head=head)
        optim = OptimConfig(name="adam", lr=1e-4, tune="head")
        train = TrainConfig(batch_size=8, epochs=10)
        if study:
            train = TrainConfig(batch_size=8, steps=10 * 96, eval_steps=96, keep="last")
    if not study:
        optim = replace(optim, class_weights="balanced")
    copies = "/oversampled" if study and model not in DEEPCOVID else ""  # DeepCovid's archive has its own
    return Config(
        name=slug("covid_xray", model, "dropout" if dropout else "", "study" if study else ""),
        data=DataConfig(dataset=f"covid_xray_5k{copies}", protocol=protocol),
        input=InputSpec(
            size=size,
            channels=3,
            interpolation="nearest" if study and model == "xray_cnn" else "bilinear",
            antialias=not study or model in DEEPCOVID,  # in torch, PIL antialiases
            mean=(0.0,) if ranged else None,
            std=(1.0,) if ranged else None,
        ),
        augment=augment,
        model=replace(network, dtype="float32" if study else None),
        optim=optim,
        train=train,
    )
