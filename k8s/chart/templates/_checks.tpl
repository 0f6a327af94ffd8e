{{- /* Written by hand. What several values together must say; a value's own kind and bounds are in values.schema.json. */ -}}

{{- define "hycluster.checks" -}}
{{- $values := $.Values -}}
{{- if and $values.redis.enabled $values.redis.address -}}
{{- fail (printf "redis.address: %s is without effect while redis.enabled is true" $values.redis.address) -}}
{{- end -}}
{{- if not (or $values.redis.enabled $values.redis.address) -}}
{{- fail "redis.address: must be HOST:PORT of your Redis where redis.enabled is false" -}}
{{- end -}}
{{- if and $values.weights.enabled (not $values.weights.repo) -}}
{{- fail "weights.repo: must be a hub id where weights.enabled is true" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.annotations) -}}
{{- fail "ingress.annotations: must have your controller ask callers for credentials; the ingress ask for none" -}}
{{- end -}}
{{- if and $values.rdma.ipcLock (not $values.rdma.enabled) -}}
{{- fail "rdma.ipcLock: true is without effect while rdma.enabled is false" -}}
{{- end -}}
{{- range $index, $group := include "hycluster.groups" $ | fromYamlArray -}}
{{- $where := printf "engines.%d" $index -}}
{{- $model := index $values.settings.models $index -}}
{{- $asked := include "hycluster.gpus" $model | int -}}
{{- $each := index $group.resources.limits (include "hycluster.constants" $ | fromJson).gpu | default 0 | int -}}
{{- if and $asked (not $each) -}}
{{- fail (printf "%s.resources.limits: nvidia.com/gpu: must be set, as %s is on %s" $where $model.name $model.hardware.accelerator) -}}
{{- end -}}
{{- if and $asked (not $group.nodeSelector) -}}
{{- fail (printf "%s.nodeSelector: must say which nodes have the accelerator %s of %s" $where $model.hardware.accelerator $model.name) -}}
{{- end -}}
{{- if ne (mul $each $group.hosts | int) $asked -}}
{{- fail (printf "%s.resources.limits: nvidia.com/gpu: %d on each of %d hosts; a replica of %s has %d" $where $each (int $group.hosts) $model.name $asked) -}}
{{- end -}}
{{- if and $group.rayResources (not (regexMatch "^[0-9]+$" (toString $group.resources.requests.cpu))) -}}
{{- fail (printf "%s.resources.requests.cpu: %v must be a whole number: Ray is told so" $where $group.resources.requests.cpu) -}}
{{- end -}}
{{- include "hycluster.checkResources" (list (printf "%s.resources" $where) $group.resources) -}}
{{- end -}}
{{- range $name, $pods := dict "head" $values.head "ingressPods" $values.ingressPods "autoscaler" $values.autoscaler "redis" $values.redis -}}
{{- include "hycluster.checkResources" (list (printf "%s.resources" $name) $pods.resources) -}}
{{- end -}}
{{- end -}}

{{- define "hycluster.checkResources" -}}
{{- $where := index . 0 -}}
{{- $resources := index . 1 -}}
{{- if ne (toString $resources.limits.memory) (toString $resources.requests.memory) -}}
{{- fail (printf "%s.limits.memory: must be what is requested (%v)" $where $resources.requests.memory) -}}
{{- end -}}
{{- end -}}
