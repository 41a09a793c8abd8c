"""What there is to train on: images in memory or streamed, text; crops on the device."""
