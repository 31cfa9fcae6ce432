"""Jobs on TPU VMs by the gcloud command line tool (`launch.tpu_vm`) and on GKE by xpk (`launch.xpk`)."""
