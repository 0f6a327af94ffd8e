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
{{- if gt (int $values.disruptionBudgets.doors) (int (include "hycluster.doors" $)) -}}
{{- fail (printf "disruptionBudgets.doors: %d of %s doors (settings.doors)" (int $values.disruptionBudgets.doors) (include "hycluster.doors" $)) -}}
{{- end -}}
{{- $names := dict "head" true "doors" true -}}
{{- $pods := 0 -}}
{{- range $index, $group := include "hycluster.groups" $ | fromYamlArray -}}
{{- $where := printf "engines.%d" $index -}}
{{- if hasKey $names $group.name -}}
{{- fail (printf "%s.name: %s is another group's" $where $group.name) -}}
{{- end -}}
{{- $_ := set $names $group.name true -}}
{{- $pods = add $pods (mul $group.minReplicas $group.hosts) -}}
{{- if lt (int $group.maxReplicas) (int $group.minReplicas) -}}
{{- fail (printf "%s.maxReplicas: %d is below minReplicas (%d)" $where (int $group.maxReplicas) (int $group.minReplicas)) -}}
{{- end -}}
{{- $gpus := index $group.resources.limits "nvidia.com/gpu" -}}
{{- if and $group.accelerator (not $gpus) -}}
{{- fail (printf "%s.resources.limits: nvidia.com/gpu: must be set, as accelerator is %s" $where $group.accelerator) -}}
{{- end -}}
{{- if and $group.accelerator (not $group.nodeSelector) -}}
{{- fail (printf "%s.nodeSelector: must say which nodes have the accelerator %s" $where $group.accelerator) -}}
{{- end -}}
{{- if and $gpus (not $group.accelerator) -}}
{{- fail (printf "%s.accelerator: must be Ray's name of the GPU type: resources has nvidia.com/gpu" $where) -}}
{{- end -}}
{{- include "hycluster.checkResources" (list (printf "%s.resources" $where) $group.resources) -}}
{{- end -}}
{{- if gt (int $values.disruptionBudgets.engines) (int $pods) -}}
{{- fail (printf "disruptionBudgets.engines: %d of %d pods that are always there" (int $values.disruptionBudgets.engines) $pods) -}}
{{- end -}}
{{- range $name, $pods := dict "head" $values.head "doors" $values.doors "autoscaler" $values.autoscaler -}}
{{- include "hycluster.checkResources" (list (printf "%s.resources" $name) $pods.resources) -}}
{{- end -}}
{{- include "hycluster.checkGpus" $ -}}
{{- end -}}

{{- define "hycluster.checkResources" -}}
{{- $where := index . 0 -}}
{{- $resources := index . 1 -}}
{{- if ne (toString $resources.limits.memory) (toString $resources.requests.memory) -}}
{{- fail (printf "%s.limits.memory: must be what is requested (%v)" $where $resources.requests.memory) -}}
{{- end -}}
{{- end -}}

{{- /* The models' GPUs of each type against those of the groups. */ -}}
{{- define "hycluster.checkGpus" -}}
{{- $least := dict -}}
{{- $most := dict -}}
{{- range $group := include "hycluster.groups" $ | fromYamlArray -}}
{{- if $group.accelerator -}}
{{- $each := mul (index $group.resources.limits "nvidia.com/gpu") $group.hosts -}}
{{- $_ := set $least $group.accelerator (add (get $least $group.accelerator | default 0) (mul $each $group.minReplicas)) -}}
{{- $_ := set $most $group.accelerator (add (get $most $group.accelerator | default 0) (mul $each $group.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- $asked := dict -}}
{{- range $model := $.Values.settings.models -}}
{{- $type := dig "hardware" "accelerator" "" $model -}}
{{- if and $type (not $model.simulated) -}}
{{- $parallel := $model.parallel | default dict -}}
{{- $gpus := mul ($parallel.tensor | default 1) ($parallel.pipeline | default 1) ($parallel.data | default 1) -}}
{{- $replicas := $model.replicas | default dict -}}
{{- $min := ternary (get $replicas "min") 1 (hasKey $replicas "min") -}}
{{- $of := get $asked $type | default (dict "min" 0 "max" 0) -}}
{{- $_ := set $asked $type (dict "min" (add $of.min (mul $gpus $min)) "max" (add $of.max (mul $gpus ($replicas.max | default $min)))) -}}
{{- end -}}
{{- end -}}
{{- range $type, $of := $asked -}}
{{- if not (hasKey $least $type) -}}
{{- fail (printf "engines: no group has the accelerator %s that settings.models ask for" $type) -}}
{{- end -}}
{{- if ne (get $least $type | int) (int $of.min) -}}
{{- fail (printf "engines: %d %s GPUs in minReplicas' pods; settings.models ask for %d" (get $least $type) $type $of.min) -}}
{{- end -}}
{{- if lt (get $most $type | int) (int $of.max) -}}
{{- fail (printf "engines: %d %s GPUs in maxReplicas' pods; settings.models ask for up to %d" (get $most $type) $type $of.max) -}}
{{- end -}}
{{- end -}}
{{- range $type, $gpus := $least -}}
{{- if not (hasKey $asked $type) -}}
{{- fail (printf "engines: there are %s GPUs, and no model in settings.models asks for them" $type) -}}
{{- end -}}
{{- end -}}
{{- end -}}
