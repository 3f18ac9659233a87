"""The library that the scripts share: formats on disk, the model, the data path, the resume contract."""
