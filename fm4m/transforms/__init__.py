"""The modalities of 4M that are text: records to strings of words ``vK=N`` and back, and crops shared by all of them.

    values           the words v0=0..v3=999, bins, codes of a codebook as words, orders given or drawn
    boxes            detected instances: "v0=xmin v1=ymin v2=xmax v3=ymax class"
    captions         which of an image's captions goes with a crop
    metadata         21 properties of an image and its labels: "v1=type v0=value"
    human_poses      people with box, body pose codes, orientation, camera and body shape
    color_palette    one to seven colours
    sam_instances    which instances lie under query points, each a box and codes of its outline
    crops            stored and drawn crops, and where a crop lies in its image
    images           crop, resize, flip and normalise pixels, depth, normals, class ids and masks

Every writer is a pure function with an inverse that reads whatever a model wrote: the inverse never raises, it counts
the stretches that it could not read. Randomness comes in as a `numpy.random.Generator`, or as the permutation itself.

Nothing is imported here. The modules need numpy only; Pillow is imported by the functions that resize.
"""
