"""How a model leaves the house: predict, evaluate, convert, doctor."""
