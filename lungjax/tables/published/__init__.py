"""The results tables of the studies, as printed: `TABLES` by name."""

from lungjax.tables.cells import Table
from lungjax.tables.published import covid_xray, covidnet_ct, covidx_ct, ct_cov19, ictcf, nccid, transfusion

MODULES = (nccid, ct_cov19, ictcf, covid_xray, covidx_ct, covidnet_ct, transfusion)
TABLES: dict[str, Table] = {table.name: table for module in MODULES for table in module.TABLES}
