"""The engine, the train step, evaluation and the trainer that drives them."""
