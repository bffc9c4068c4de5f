"""What the model reads: vocabulary, gap sentences, sources, input pipeline.

May import nothing else of the package; numpy, sentencepiece, grain.
"""
