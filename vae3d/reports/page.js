const show=v=>v===null?'not finite':Math.abs(v)>=1e4||Number.isInteger(v)?
  Math.round(v).toLocaleString('en').replaceAll(',','\u202f'):String(+v.toPrecision(4));
for(const figure of document.querySelectorAll('figure.chart')){
  const source=figure.querySelector('script');if(!source)continue;
  const d=JSON.parse(source.textContent),svg=figure.querySelector('svg');
  const cursor=svg.querySelector('.cursor'),out=figure.querySelector('output');
  svg.addEventListener('pointermove',e=>{
    const box=svg.getBoundingClientRect(),width=svg.viewBox.baseVal.width;
    const px=(e.clientX-box.left)/box.width*width;
    const x=d.x[0]+(px-d.left)/(d.right-d.left)*(d.x[1]-d.x[0]);
    const near=d.series.map(s=>s.points.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a));
    const at=near.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a)[0];
    const cx=d.left+(at-d.x[0])/((d.x[1]-d.x[0])||1)*(d.right-d.left);
    cursor.setAttribute('x1',cx);cursor.setAttribute('x2',cx);cursor.style.visibility='visible';
    out.replaceChildren('step '+show(at),...near.flatMap((p,i)=>{
      const s=document.createElement('b');s.style.color=d.series[i].color;
      s.textContent='\u2002'+show(p[1]);return[s]}));
  });
  svg.addEventListener('pointerleave',()=>{cursor.style.visibility='hidden';out.replaceChildren()});
}
for(const table of document.querySelectorAll('table.sortable')){
  const body=table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head,i)=>head.addEventListener('click',()=>{
    const down=head.getAttribute('aria-sort')==='ascending';
    for(const h of table.tHead.rows[0].cells)h.removeAttribute('aria-sort');
    head.setAttribute('aria-sort',down?'descending':'ascending');
    const key=row=>{const c=row.cells[i];return c.dataset.v===undefined?c.textContent:+c.dataset.v};
    const rows=[...body.rows].sort((a,b)=>{const x=key(a),y=key(b);
      return typeof x==='number'&&typeof y==='number'?x-y:String(x).localeCompare(String(y))});
    body.append(...(down?rows.reverse():rows));
  }));
}
for(const box of document.querySelectorAll('.stepper')){
  const range=box.querySelector('input');if(!range)continue;
  const out=box.querySelector('.steps output');
  const frames=[...box.querySelectorAll('[data-step]')];
  const steps=[...new Set(frames.map(f=>f.dataset.step))];
  const go=()=>{const step=steps[+range.value];out.textContent='step '+show(+step);
    for(const f of frames)f.hidden=f.dataset.step!==step};
  range.addEventListener('input',go);go();
}
