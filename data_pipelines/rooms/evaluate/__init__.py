"""How good a trained model's generation is on held-out rooms: ``python -m data_pipelines.rooms.evaluate``.

    __main__.py      the command
    settings.py      how every target is generated
    run.py           batches through the generator, with the time that is left
    truth.py         the exact rooms of a pack, and guesses that look at no input
    from_rgb.py      depth, normals, classes, boxes and captions from the picture alone
    from_caption.py  everything from the caption alone
    words.py         captions as sets of words
    table.py         numbers with their errors
    sheets.py        contact sheets
    files.py         what is left behind
    larger.py        a super-resolution model, a command of its own
"""
