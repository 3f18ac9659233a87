"""The library that the scripts share: formats on disk, the model, the data path, the resume contract."""

DEFAULT_MODEL = "hubertsiuzdak/snac_24khz"  # what every script takes where no flag names a codec
