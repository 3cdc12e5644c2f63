"""The small network of the COVID X-ray study (github.com/Mithunjack/covid-19-xay-image-classification).

Two 3x3 convolutions of stride 3, each with ReLU and a 2x2 max pool, are followed by a dense layer of 256 units. The
study's code passes positional arguments of an older Keras, which were read as kernel 3 and stride 3 in training. The
single logit is for the study's second class, "non" (`head.output=sigmoid`, `head.positive_class=non`). With images of
256 x 256 x 3 and one logit, the network has 422,177 parameters. Initialization is Glorot uniform.
The study's summary has dropout after each pool, but its last run disabled it (0.25).
"""

from functools import partial

from lungjax.config import HeadConfig
from lungjax.models.transfusion import Transfusion

HEAD = HeadConfig(pool="flatten", hidden=(256,))
XRAY = {"xray_cnn": partial(Transfusion, 3, (64, 32), stride=3, pool=2, norm=False, head=HEAD)}
