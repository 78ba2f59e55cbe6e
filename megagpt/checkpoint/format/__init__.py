"""The files of a checkpoint; knows neither process groups nor DeepSpeed."""
