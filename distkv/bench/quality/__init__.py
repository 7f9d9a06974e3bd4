"""`distkv bench quality`: what codecs and policies of attention cost in answers, beside the whole and exact cache."""
