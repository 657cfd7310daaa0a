"""From decoded frames to model inputs.

image_processor    the parameters (size, filter, crop, normalization) and the class that users of transformers know
resize             how 8-bit frames are resized and cropped
"""
