"""Weights in and out: files of ours, layouts of other libraries, folders of Hugging Face.

The networks do not import this room, which knows them all; see `vae3d.models.custom_vae.door`.
"""
