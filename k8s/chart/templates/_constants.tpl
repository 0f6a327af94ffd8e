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
  "doors": 2,
  "doorResources": {
    "door": 0.5
  },
  "serve": {
    "proxy_location": "Disabled",
    "applications": [
      {
        "name": "hycluster",
        "route_prefix": null,
        "import_path": "hycluster.app:build",
        "args": {}
      }
    ]
  },
  "redisAddress": "hycluster-redis:6379",
  "drainTimeoutSeconds": 60,
  "drainMarginSeconds": 60,
  "graceMarginSeconds": 30,
  "deletionMarginSeconds": 0,
  "group": {
    "nodeSelector": {},
    "tolerations": [],
    "priorityClassName": "",
    "hosts": 1,
    "accelerator": "",
    "sharedMemory": "1Gi"
  }
}
{{- end -}}
