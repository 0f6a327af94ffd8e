{{- /* Made by 'hycluster k8s render' from the code. */ -}}
{{- define "hycluster.constants" -}}
{
  "listen": {
    "http": {
      "host": "0.0.0.0",
      "port": 8000
    },
    "grpc": {
      "host": "0.0.0.0",
      "port": 9000
    }
  },
  "openAuth": {
    "open": true
  },
  "ingressReplicas": 2,
  "ingressResources": {
    "ingress": 0.5
  },
  "ingressReplicasPerPod": 1,
  "batchesResources": {
    "batches": 1
  },
  "serve": {
    "proxy_location": "Disabled",
    "controller_options": {
      "runtime_env": {
        "env_vars": {
          "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1000000"
        }
      }
    },
    "applications": [
      {
        "name": "hycluster",
        "route_prefix": null,
        "import_path": "hycluster.app:build",
        "args": {}
      }
    ]
  },
  "drainTimeoutSeconds": 60,
  "drainMarginSeconds": 30,
  "graceMarginSeconds": 20,
  "deletionMarginSeconds": 15,
  "share": 0.001,
  "gpu": "nvidia.com/gpu",
  "group": {
    "priorityClassName": "hycluster-engines",
    "nodeSelector": {},
    "tolerations": [],
    "hosts": 1,
    "rayResources": {},
    "sharedMemory": "1Gi"
  }
}
{{- end -}}
