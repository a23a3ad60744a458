"""`memoryformer inspect`: how a trained model reads its tables on some text (the paper's Figure 4)."""
