"""What is bolted on for inference: dense heads arrive with their tasks. The classifier is a linear layer of the model itself."""
