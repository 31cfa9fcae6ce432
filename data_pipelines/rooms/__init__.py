"""The built-in data set "rooms": rendered interiors with RGB, depth, normals, semantic labels, boxes and captions.

`data_pipelines.rooms.pack` reads the shipped packs and needs only numpy and Pillow. `data_pipelines.rooms.generate`
renders more samples from the Debian package sweethome3d-furniture and additionally needs numba and tqdm.
"""
