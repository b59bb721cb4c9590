"""Speed, memory and energy of a model on a device, predicted from facts and measurements."""
