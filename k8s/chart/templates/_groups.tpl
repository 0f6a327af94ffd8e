{{- /* Written by hand. The engines' groups, as hycluster/k8s/sizes.py and patches.py count them. */ -}}

{{- /* Name of what only one model's pods have, where there are several models. */ -}}
{{- define "hycluster.slug" -}}
{{- regexReplaceAll "[^a-z0-9]+" (lower .) "-" | trimAll "-" | trunc 40 | trimAll "-" | printf "engines-%s" -}}
{{- end -}}

{{- /* GPUs of a replica of a model; 0 on CPU. */ -}}
{{- define "hycluster.gpus" -}}
{{- $accelerator := (.hardware | default dict).accelerator -}}
{{- $parallel := .parallel | default dict -}}
{{- if and $accelerator (not .simulated) -}}
{{- mul ($parallel.tensor | default 1) ($parallel.pipeline | default 1) ($parallel.data | default 1) -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{- /* .Values.engines, with what they do not say and what follows from settings.models. */ -}}
{{- define "hycluster.groups" -}}
{{- $constants := include "hycluster.constants" $ | fromJson -}}
{{- $models := $.Values.settings.models -}}
{{- $several := gt (len $models) 1 -}}
{{- if ne (len $models) (len $.Values.engines) -}}
{{- fail (printf "engines: %d entries; must be one for each of the %d settings.models, in the same order" (len $.Values.engines) (len $models)) -}}
{{- end -}}
{{- range $index, $given := $.Values.engines -}}
{{- $model := index $models $index -}}
{{- $replicas := $model.replicas | default dict -}}
{{- $least := int (ternary $replicas.min 1 (hasKey $replicas "min")) -}}
{{- $most := int ($replicas.max | default $least) -}}
{{- $first := int (ternary $least $replicas.initial (kindIs "invalid" $replicas.initial)) -}}
{{- $gpus := include "hycluster.gpus" $model | int -}}
{{- /* Helm has no defaults for a list's items. */ -}}
{{- $group := mergeOverwrite (deepCopy $constants.group) (deepCopy $given) -}}
{{- $hosts := int $group.hosts -}}
{{- $_ := set $group "name" (ternary (include "hycluster.slug" $model.name) "engines" $several) -}}
{{- $_ := set $group "several" $several -}}
{{- $_ := set $group "minReplicas" $least -}}
{{- $_ := set $group "replicas" $first -}}
{{- /* Room for a successor. */ -}}
{{- $_ := set $group "maxReplicas" (add1 $most) -}}
{{- /* Of several, one at a time may go; the only one stays until somebody decides. */ -}}
{{- $_ := set $group "minAvailable" (mul (ternary (sub $least 1) $least (gt $least 1)) $hosts) -}}
{{- $ray := $group.rayResources -}}
{{- if or $several $gpus $ray -}}
{{- $_ := set $ray "CPU" (toString $group.resources.requests.cpu) -}}
{{- end -}}
{{- if $gpus -}}
{{- $_ := set $ray "GPU" (toString (index $group.resources.limits $constants.gpu)) -}}
{{- $_ := set $ray (printf "accelerator_type:%s" $model.hardware.accelerator) "1" -}}
{{- end -}}
{{- if $several -}}
{{- $_ := set $ray $group.name "1" -}}
{{- end -}}
{{- $_ := set $group "rayResources" $ray -}}
{{- if $.Values.rdma.enabled -}}
{{- $_ := set $group.resources.requests $.Values.rdma.resource "1" -}}
{{- $_ := set $group.resources.limits $.Values.rdma.resource "1" -}}
{{- end }}
{{ list $group | toYaml }}
{{- end -}}
{{- end -}}
