"""Models in and out, in the layout of Hugging Face's folders.

`import_folder.py` checks a folder and writes it as a checkpoint's, `export_folder.py` goes the other way; both go
tensor by tensor through `conversion.py`. `fp8.py` has DeepSeek's block-quantized weights, `tokenizer.py` the
tokenizer's files, `sources.py` which files a folder is made of.
"""
